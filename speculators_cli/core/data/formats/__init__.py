"""The data formats, by name."""

from speculators_cli.core.data.formats import specforge, speculators, v0, v1
from speculators_cli.core.data.formats.format import Format

FORMATS: dict[str, Format] = {
    form.name: form for form in (v0.FORMAT, v1.FORMAT, speculators.FORMAT, specforge.FORMAT)
}
