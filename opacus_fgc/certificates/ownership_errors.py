"""What is wrong with rows that belong to no sample, or to several."""

from __future__ import annotations

from opacus_fgc.certificates.backprops import Backprops, Output
from opacus_fgc.certificates.noise import Noise, is_beyond
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError


def owner_error(
    size: int, plain: Backprops, several: Backprops, noise: Noise, key: Output, row: int, layer: str
) -> Exception:
    """The error for a row that has not one owner.

    Args:
        size: number of samples.
        plain: what came of a pass under ones.
        several: what came of a pass under eights.
        noise: by how much passes under ones differ.
        key: the output that has the row.
        row: the row.
        layer: what to call the layer.
    """
    of_ones = plain.sketches[key]
    of_eights = several.sketches.get(key, of_ones)
    if is_beyond(of_eights - 8 * of_ones, 8 * of_ones, plain.half, 16 * noise.allowed(key, of_ones)).any():
        return PrivacyNotImplementedError(
            f"{layer} gets a gradient that is not linear in the loss: for 8 times the loss it is not 8 times as large. "
            "Between this layer and the loss there is a gradient hook, or an autograd.Function with a backward of its "
            "own, that clamps, normalizes or the like, so that clipping a sample's loss does not clip its gradient. "
            "Remove it: each sample's gradient is clipped as a whole anyway"
        )
    if size > len(of_ones) > 1 and size % len(of_ones) == 0:
        return PrivacyValueError(
            f"{layer}: its rows are not samples: it was called on {len(of_ones)} rows, and there are {size} losses. "
            f"{TOKENS}. If the batch lies on another axis there, let it lie on the first (see batch_first). {PADDING}"
        )
    if len(of_ones) % size:
        return PrivacyNotImplementedError(
            f"{layer}: its rows are not samples: it was called on {len(of_ones)} rows for {size} samples, and several of "
            "these have a part in one row. Inputs that the batch shares, expand (x.expand(batch_size, ...)); and if the batch "
            f"lies on another axis there, let it lie on the first (see batch_first). {PADDING}"
        )
    return PrivacyNotImplementedError(
        f"{layer} gets a gradient of several samples in one row (row {row}), so something mixes samples: the "
        "model, the criterion, or what is between this layer and the loss (a batch norm, a mean, a similarity or a "
        "shift over the batch; negatives from the batch; a term of the whole batch in each loss); or its rows are not "
        "samples (check batch_first). Then no sample has a gradient of its own. Let each sample's loss depend on that "
        "sample alone"
    )


def order_error(layer: str, row: int, sample: int, of_units: bool) -> Exception:
    """The error for rows of the batch that belong to the losses of other samples.

    Args:
        layer: what to call the layer that was called on them.
        row: one of them.
        sample: the sample whose loss it belongs to.
        of_units: whether samples are units of several records.
    """
    if of_units:
        return PrivacyNotImplementedError(
            f"{layer}: its rows are not records, in the order of the criterion's argument unit: row {row} belongs to the loss of "
            f"another unit (the {sample + 1}. of the batch). Something sorts, selects or shifts records before or after this "
            "layer. Keep rows, losses and unit in the order of the batch; where a collate function sorts records, have it sort "
            "their units as well"
        )
    return PrivacyNotImplementedError(
        f"{layer}: its rows are not samples, in the order of their losses: row {row} belongs to the loss of sample {sample}. "
        "Something selects, regroups, sorts or shifts samples before or after this layer. Keep rows and losses in the "
        f"order of the batch, one row a sample. {PADDING}"
    )


def packed_error(layer: str) -> Exception:
    """The error for positions that belong to other losses than the criterion's arguments say.

    Args:
        layer: what to call the layer that has them.
    """
    return PrivacyNotImplementedError(
        f"{layer}: its positions belong to other losses than position_ids says. Give the criterion those that the model got, and "
        "let the model keep the tokens in their order"
    )


PADDING = (
    "Where samples have different numbers of rows (layer(x[mask]), tokens that are routed, graphs in one batch), pad "
    "them to the same number and use a mask. Where a batch is torch.cat of several views, call the layer once for each "
    "view, or put the views on an axis of their own in the model's forward, (N, K, ...)"
)
"""What to do about layers whose rows are not the samples, or the same number of rows for each."""

TOKENS = "If the losses are those of flattened tokens, call the criterion with shape=(batch size, tokens, ...)"
"""What to do about more losses than rows."""
