"""Scoring of results: by which split, in which direction, and which index is then best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from danling_core.errors import ConfigError

ScoreMode = Literal["min", "max"]

_SMALLER = """
loss losses error err mse rmse msle rmsle mae mape smape hinge nll bce ce cross_entropy crossentropy
entropy negative_log_likelihood brier ece ppl perplexity bpb bpc bits_per_byte bits_per_character
wer cer ter fid kid lpips kl kl_divergence hamming distance eer fpr fnr mpjpe
"""
_LARGER = """
accuracy acc top1 top5 hits exact_match em win_rate tpr tnr f1 fbeta auc auroc aucroc auprc ap map
mrr ndcg precision recall sensitivity specificity r2 r2score explained_variance pearson pearsonr
spearman spearmanr kendall correlation mcc matthews kappa iou miou jaccard dice bleu chrf meteor
rouge rougel psnr ssim reward returns elbo likelihood log_likelihood
"""
SMALLER_IS_BETTER = frozenset(_SMALLER.split())
LARGER_IS_BETTER = frozenset(_LARGER.split())


def resolve_score_mode(score_name: str, score_mode: ScoreMode | None = None) -> ScoreMode:
    """Return the stated mode, or the one known for this metric ("task/top5_accuracy" is an accuracy).

    Raises:
        ConfigError: where the mode is not stated and not known, or is neither "min" nor "max".
    """
    if score_mode is not None:
        if score_mode not in ("min", "max"):
            raise ConfigError(f"score_mode must be 'min' or 'max', got {score_mode!r}")
        return score_mode
    for word in _candidates(score_name):
        if word in SMALLER_IS_BETTER:
            return "min"
        if word in LARGER_IS_BETTER:
            return "max"
    raise ConfigError(
        f"score_name is {score_name!r}, and it is not known whether smaller or larger is better: "
        "set score_mode to 'min' or 'max'"
    )


def fallback_split(splits: Sequence[str]) -> str | None:
    """Return the split to score by where none is stated: val, validate, the second, the first."""
    for name in ("val", "validate"):
        if name in splits:
            return name
    return (splits[1] if len(splits) > 1 else splits[0]) if splits else None


def is_better(score: float, than: float, score_mode: ScoreMode) -> bool:
    """Return whether `score` beats `than`, compared exactly; NaN beats nothing."""
    return score < than if score_mode == "min" else score > than


def best_index_of(scores: Mapping[int, float], score_mode: ScoreMode) -> int | None:
    """Return the index of the best score; the earliest of equals, never one of NaN."""
    best: int | None = None
    for index in sorted(scores):
        if not math.isnan(scores[index]) and (
            best is None or is_better(scores[index], scores[best], score_mode)
        ):
            best = index
    return best


def _candidates(score_name: str) -> list[str]:
    """Return the whole name, its last word, its first; each also without a trailing count, as in "acc@5"."""
    name = score_name.rsplit("/", 1)[-1]
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower().replace("-", "_").replace(" ", "_")
    words = [name, name.rsplit("_", 1)[-1], name.split("_", 1)[0]]
    return [form for word in words for form in (word, re.sub(r"@?\d+$", "", word))]
