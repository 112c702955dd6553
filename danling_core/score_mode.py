"""Which way is better: the direction of the common metrics, by name."""

from __future__ import annotations

import re
from typing import Literal

from danling_core.errors import ConfigError

ScoreMode = Literal["min", "max"]

SMALLER_IS_BETTER = frozenset(
    "loss losses error err mse rmse msle mae mape smape rmsle nll bce ce ppl perplexity cross_entropy crossentropy "
    "entropy bpb bpc bits_per_byte bits_per_character wer cer ter fid kid lpips kl kl_divergence brier ece hinge "
    "hamming distance negative_log_likelihood eer fpr fnr mpjpe".split()
)
LARGER_IS_BETTER = frozenset(
    "accuracy acc f1 fbeta auc auroc aucroc auprc ap map mrr ndcg precision recall sensitivity specificity r2 r2score "
    "explained_variance pearson spearman kendall pearsonr spearmanr correlation mcc matthews kappa iou miou jaccard "
    "dice bleu chrf meteor rouge rougel psnr ssim hits top1 top5 tpr tnr em exact_match likelihood log_likelihood elbo "
    "reward returns win_rate".split()
)


def resolve_score_mode(score_name: str, score_mode: ScoreMode | None = None) -> ScoreMode:
    """The stated mode, or the one known for this metric ("val/top5_accuracy" is an accuracy).

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


def _candidates(score_name: str) -> list[str]:
    """The whole name first, then its last word, then its first; each also without a trailing count, as in "acc@5"."""
    name = score_name.rsplit("/", 1)[-1]
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower().replace("-", "_").replace(" ", "_")
    words = [name, name.rsplit("_", 1)[-1], name.split("_", 1)[0]]
    return [form for word in words for form in (word, re.sub(r"@?\d+$", "", word))]
