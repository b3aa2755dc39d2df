"""Escaping of untrusted text, so that no character moves the cursor or reorders a line."""

import re

# Control characters (C0 except tab and newline, DEL, C1), invisible marks that reorder or hide
# text, line separators, and bytes of a file name that are not UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_VALUE = re.compile("`[^`]*`")


def escape(text: str) -> str:
    r"""Escape unsafe characters as `\x1b` or `\u202e`; newlines and tabs are kept."""
    return text if text.isprintable() else _UNSAFE.sub(lambda found: _code(found[0]), text)


def escape_line(text: str) -> str:
    """Escape unsafe characters and newlines."""
    return escape(text).replace("\n", r"\n")


def escape_message(text: str) -> str:
    """Escape unsafe characters, and newlines between backticks, which enclose values."""
    return _VALUE.sub(lambda found: escape_line(found[0]), escape(text))


def _code(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # Python's surrogates for bytes that are not UTF-8
        number -= 0xDC00
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
