"""Stage 1: from the input to shards of tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice

from speculators_cli.core.capture.answers import Regeneration
from speculators_cli.core.capture.engines import Engines
from speculators_cli.core.capture.job import Job
from speculators_cli.core.capture.rendered import LeftOut, RenderCounts, Rendered, check_left_out
from speculators_cli.core.conversations.bad_rows import BadRow, BadRows
from speculators_cli.core.conversations.prompt_files import Prompts, read_row
from speculators_cli.core.conversations.prompts import Source
from speculators_cli.core.data.token_shards import TokenShard, read_counts, write_shard
from speculators_cli.core.engines.engine import Answerer
from speculators_cli.core.progress import Progress

NUM_EXAMPLES = 2  # of what was left out, per shard


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the input."""

    number: int
    sources: Sequence[Source]
    bad: Sequence[BadRow]


def read_shards(
    prompts: Prompts,
    is_wanted: Callable[[int], bool],
    *,
    shard_size: int,
    max_rows: int | None,
    vocab_size: int,
) -> Iterator[Shard]:
    """Yield the wanted shards in order; rows of others are not decoded."""
    rows = enumerate(prompts.iterate(0))
    for number, group in groupby(rows, key=lambda row: row[0] // shard_size):
        if max_rows is not None and number * shard_size >= max_rows:
            return
        if not is_wanted(number):
            continue
        sources: list[Source] = []
        bad: list[BadRow] = []
        for index, (place, decode) in group:
            if max_rows is not None and index >= max_rows:
                break
            found = read_row(place, decode, index, vocab_size=vocab_size)
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                sources.append(found)
        yield Shard(number, sources, bad)


class RowMaker:
    """Makes rows of tokens of sources, with the answers given or generated.

    Args:
        job: The verifier and the settings.
        get_answerer: Loads what generates answers, when it is needed.
    """

    def __init__(self, job: Job, get_answerer: Callable[[], Answerer]) -> None:
        self._job = job
        self._get_answerer = get_answerer
        self._renderer = job.build_renderer()

    def make(self, sources: Sequence[Source]) -> list[Rendered]:
        """Return the rows of each source."""
        tokens = self._job.settings.tokens
        if not tokens.regenerate:
            return list(self._renderer.rows_of_all(sources))
        regeneration = Regeneration(
            self._renderer,
            self._get_answerer(),
            self._job.tokenizer,
            sampling=self._job.sampling,
            seed=tokens.seed,
            max_tokens=self._job.max_tokens,
            keeps_truncated=not tokens.skip_truncated_answers,
        )
        return regeneration.answer_all(sources)


def make_tokens(
    job: Job, prompts: Prompts, num_rows: int, engines: Engines, progress: Progress
) -> None:
    """Write the shards of this rank that are missing.

    Args:
        job: The verifier, the settings and the rank.
        prompts: The input.
        num_rows: Rows of it that are read.
        engines: Generate answers.
        progress: Reports progress.

    Raises:
        DataError: Too many rows of the input cannot be used.
    """
    settings = job.settings.input
    missing = {
        number: min(settings.shard_size, num_rows - number * settings.shard_size)
        for number in job.own_shards(num_rows)
        if not job.folder.shard(number).exists()
    }
    if not missing:
        return
    maker = RowMaker(job, lambda: engines.answerer)
    bad = BadRows(settings.max_bad_rows)
    found = read_shards(
        prompts,
        missing.__contains__,
        shard_size=settings.shard_size,
        max_rows=settings.max_conversations,
        vocab_size=job.vocab_size,
    )
    verb = "Answering" if job.settings.tokens.regenerate else "Rendering"
    with progress.task(f"{verb} conversations", sum(missing.values())) as task:
        while group := list(islice(found, engines.num_shards_at_once)):
            rendered = iter(maker.make([source for shard in group for source in shard.sources]))
            for shard in group:
                made = list(islice(rendered, len(shard.sources)))
                write_shard(build_shard(shard, made), job.folder.shard(shard.number))
                bad.num_rows += len(shard.sources)
                for row in shard.bad:
                    bad.add(row)
                task.advance(missing[shard.number])


def build_shard(shard: Shard, rendered: Sequence[Rendered]) -> TokenShard:
    """Return a shard of rows, with the counts of what it was made from."""
    counts = RenderCounts.total(map(RenderCounts.of, rendered))
    left_out = [left for one in rendered for left in one.left_out]
    return TokenShard(
        tuple(row for one in rendered for row in one.rows),
        {
            "rendered": counts.to_json(),
            "examples": [asdict(left) for left in left_out[:NUM_EXAMPLES]],
            "bad_rows": [asdict(row) for row in shard.bad],
        },
    )


@dataclass(frozen=True)
class TokenTotals:
    """Counts over all shards."""

    rendered: RenderCounts
    bad: BadRows
    num_bytes: int


def sum_up_tokens(job: Job, shards: Sequence[int]) -> TokenTotals:
    """Add up the counts of shards, of all ranks and earlier runs.

    Raises:
        DataError: Too many rows cannot be used, too many answers were left out, or no token is
            supervised.
    """
    files = [job.folder.shard(number) for number in shards]
    counts = [read_counts(file) for file in files]
    rendered = RenderCounts.total(RenderCounts.from_json(x["rendered"]) for x in counts)
    listed = [BadRow(**row) for x in counts for row in x["bad_rows"]]
    bad = BadRows(
        job.settings.input.max_bad_rows,
        num_rows=rendered.num_sources + len(listed),
        num_bad=len(listed),
        listed=listed,
    )
    bad.check()
    check_left_out(rendered, [LeftOut(**x) for one in counts for x in one["examples"]])
    return TokenTotals(rendered, bad, sum(file.stat().st_size for file in files))
