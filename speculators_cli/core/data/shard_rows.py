"""Single rows of shards of tokens, read without the others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speculators_cli.core.data.formats.safetensors_file import SafetensorsFile
from speculators_cli.core.data.sample import BadSampleError, ChangedSampleError, refusing_sample
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.errors import DataError
from speculators_cli.core.files import open_regular
from speculators_cli.core.torch_file.open_file import OpenFile


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard has its tokens."""

    file: Path
    num_bytes: int  # of the file
    ids_at: int  # byte offset
    mask_at: int


def locate(file: Path) -> ShardPlace:
    """Find the tokens of a shard, to read some of its rows later.

    Raises:
        DataError: It is damaged.
    """
    try:
        with SafetensorsFile(file) as content:
            tensors = content.tensors
            ids_at, mask_at = (tensors[key].start for key in ("input_ids", "loss_mask"))
            return ShardPlace(file, content.source.num_bytes, ids_at, mask_at)
    except KeyError as error:
        raise _damaged(file, f"has no {error}") from None
    except BadSampleError as error:
        raise _damaged(file, error.reason) from None
    except OSError as error:
        raise _damaged(file, f"cannot be read: {error.strerror}") from None


def read_row(place: ShardPlace, start: int, num_tokens: int, name: str) -> TokenRow:
    """Read one row of a shard, which starts at a token.

    Raises:
        ChangedSampleError: The shard has changed since it was located.
    """
    try:
        source = OpenFile(open_regular(place.file), place.file)
    except OSError as error:
        raise ChangedSampleError(place.file, error.strerror or str(error)) from None
    if source.num_bytes != place.num_bytes:
        raise ChangedSampleError(place.file, "has a different size than at the start of the run")
    ids, mask = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.bool_)
    with refusing_sample():
        source.fill(ids.view(np.uint8), place.ids_at + ids.itemsize * start)
        source.fill(mask.view(np.uint8), place.mask_at + start)
    source.close()
    return TokenRow(name, ids, mask)


def _damaged(file: Path, problem: str) -> DataError:
    return DataError(
        f"`{file}` {problem}", hint="Remove the file, then rerun `speculators generate-data`"
    )
