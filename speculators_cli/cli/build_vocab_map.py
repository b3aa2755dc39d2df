"""`speculators build-vocab-map`."""

from typing import TYPE_CHECKING

from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output
from speculators_cli.settings.build_vocab_map import BuildVocabMapSettings

if TYPE_CHECKING:
    from speculators_cli.core.preparation.vocabulary import VocabMapReport

EXAMPLES = (
    "speculators build-vocab-map --verifier-name-or-path Qwen/Qwen3-8B --data-path data",
    "speculators build-vocab-map --target-vocab-size 151936 --token-freq-path token_freq.pt",
    "speculators build-vocab-map --verifier-name-or-path Qwen/Qwen3-8B --draft-vocab-size 64000",
)


@with_settings(BuildVocabMapSettings, examples=EXAMPLES)
def build_vocab_map(*, settings: BuildVocabMapSettings, output: Output) -> None:
    """Write the maps, and report what they cover."""
    from speculators_cli.core.preparation import vocabulary

    report = vocabulary.build_vocab_map(settings, progress=output)
    if output.is_json:
        output.result("build-vocab-map", report.to_json())
    else:
        what = "tokens" if settings.counts.all_tokens else "supervised tokens"
        show(report, what if report.token_freq_path else "counted tokens", output)
    output.hint(
        f"Pass `--d2t-path {report.d2t_path} --t2d-path {report.t2d_path}` to `speculators train`"
    )


def show(report: "VocabMapReport", what: str, output: Output) -> None:
    """Write what was kept, and what other sizes would cover."""
    output.line(
        f"Kept {report.draft_vocab_size:,} of {report.vocab_size:,} verifier tokens, covering "
        f"{report.coverage:.1%} of {report.num_counted_tokens:,} {what}: "
        f"`{report.d2t_path}`, `{report.t2d_path}`"
    )
    sizes = [f"{size:,}" for size in report.coverage_by_size]
    shares = [f"{share:.1%}" for share in report.coverage_by_size.values()]
    output.table(["draft vocabulary", *sizes], [["tokens covered", *shares]])
    if report.probability_mass is not None:
        output.line(
            f"Verifier probability within the draft vocabulary: {report.probability_mass:.1%}, "
            "an upper bound of the acceptance rate when sampling"
        )
