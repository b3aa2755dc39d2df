"""The data formats: one line each.

A `.pt` file is of the first format that recognises it: the keys of v0 are also those of SpecForge.
"""

from speculators_cli.core.data.formats import specforge, speculators, v0, v1
from speculators_cli.core.data.formats.format import Format

FORMATS: dict[str, Format] = {
    form.name: form for form in (specforge.FORMAT, v0.FORMAT, v1.FORMAT, speculators.FORMAT)
}
