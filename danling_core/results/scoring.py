"""Scoring of results: by which split, in which direction, and which index is then best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from danling_core.errors import ConfigError
from danling_core.suggest import nearest

ScoreMode = Literal["min", "max"]

_SMALLER = """
loss losses error err mse rmse msle rmsle mae mape smape hinge nll bce ce cross_entropy crossentropy
entropy negative_log_likelihood brier ece ppl perplexity bpb bpc bits_per_byte bits_per_character
wer cer ter fid kid lpips kl kl_divergence hamming distance eer fpr fnr mpjpe error_rate mean_squared_error
mean_absolute_error root_mean_squared_error word_error_rate char_error_rate calibration_error
"""
_LARGER = """
accuracy acc top1 top5 hits exact_match em win_rate tpr tnr f1 f1_score fbeta fbeta_score auc auroc aucroc auprc
ap map average_precision mrr ndcg precision recall sensitivity specificity r2 r2score r2_score explained_variance
pearson pearsonr pearson_corr_coef spearman spearmanr spearman_corr_coef kendall correlation mcc
matthews matthews_corr_coef kappa cohen_kappa iou miou jaccard jaccard_index dice bleu chrf meteor rouge rougel psnr
ssim reward returns elbo likelihood log_likelihood
"""
_NEUTRAL = """
binary multiclass multilabel macro micro weighted mean average avg balanced total overall top score rate
train val valid validate validation test eval dev token tokens word char pixel class
"""
SMALLER_IS_BETTER = frozenset(_SMALLER.split())
LARGER_IS_BETTER = frozenset(_LARGER.split())
NEUTRAL = frozenset(_NEUTRAL.split())
"""Words beside a known metric that leave its direction as it is. `neg`, `gap`, `std` and the like do not."""


def resolve_score_mode(score_name: str, score_mode: ScoreMode | None = None) -> ScoreMode:
    """Return the stated mode, or the one known for this metric ("task/top5_accuracy" is an accuracy).

    Raises:
        ConfigError: where the mode is not stated and not known, or is neither "min" nor "max".
    """
    if score_mode is not None:
        if score_mode not in ("min", "max"):
            raise ConfigError(f"score_mode must be 'min' or 'max', got {score_mode!r}")
        return score_mode
    if (known := _known_metric(score_name)) is not None:
        return "min" if known in SMALLER_IS_BETTER else "max"
    near = nearest(score_name, SMALLER_IS_BETTER | LARGER_IS_BETTER)
    hint = "" if near is None else f"did you mean {near!r}? Else "
    raise ConfigError(
        f"score_name is {score_name!r}, and it is not known whether smaller or larger is better: {hint}"
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


def _known_metric(score_name: str) -> str | None:
    """Return the known metric in a name, as `acc` in "val_acc@5", if its other words are neutral; else None."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", score_name.rsplit("/", 1)[-1]).lower()
    words = [re.sub(r"@?\d+$", "", word) or word for word in re.split(r"[-_ ]+", name)]
    exact = re.split(r"[-_ ]+", name)
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            for spelled in (exact, words):
                found = "_".join(spelled[start : start + length])
                rest = {*words[:start], *words[start + length :]} - NEUTRAL
                if any(found in known and rest <= known for known in (SMALLER_IS_BETTER, LARGER_IS_BETTER)):
                    return found
    return None
