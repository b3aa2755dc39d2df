"""The table of data formats.

A `.pt` file has the first format that matches: samples of SpecForge have the keys of v0, too.
"""

from speculators_cli.core.data.formats import specforge, speculators, v0, v1
from speculators_cli.core.data.formats.format import Format

FORMATS: dict[str, Format] = {
    form.name: form for form in (specforge.FORMAT, v0.FORMAT, v1.FORMAT, speculators.FORMAT)
}
