"""The data formats, by version."""

from speculators_cli.core.data.formats import v0, v1

FORMATS = {0: v0.FORMAT, 1: v1.FORMAT}
