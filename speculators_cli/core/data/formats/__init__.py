"""The data formats, by name."""

from speculators_cli.core.data.formats import specforge, v0, v1

FORMATS = {"v0": v0.FORMAT, "v1": v1.FORMAT, "specforge": specforge.FORMAT}
