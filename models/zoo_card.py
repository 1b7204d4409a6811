"""What the cards of the zoo's models say beyond the facts: data, licence, limits, and what each reached in a fleet."""

from __future__ import annotations

from torch import nn

from models.card import CardNotes
from models.federated import results
from models.zoo import ZOO, load

_DATA = {
    "smartwatch": "Six-axis recordings of shoulder exercises, 10 people and both wrists (D. M. Burns et al., "
    "arXiv:1802.01489, by way of seglearn; BSD licence). The first parameters come from two people, the operator's.",
    "fashion-mnist": "Fashion-MNIST (H. Xiao et al., arXiv:1708.07747; MIT licence). The first parameters come from "
    "the operator's own images alone.",
    "digits": "Optical Recognition of Handwritten Digits, its test set (E. Alpaydin and C. Kaynak, "
    "doi:10.24432/C50P49, by way of scikit-learn; CC BY 4.0). The first parameters come from the operator's own "
    "digits alone.",
}
_LIMITS = {
    "smartwatch": "Learned from ten people who did seven shoulder exercises with one kind of watch. It knows no other "
    "movement, takes only windows of 2 s at 50 Hz that are normalized as `models/data/smartwatch.py` has it, and is no "
    "medical device.",
    "fashion-mnist": "Takes only grey images that are cut, centred and normalized like those of the data set; on "
    "photographs its answers mean nothing.",
    "digits": "Takes only digits that are cut, centred and scaled like those of the data set.",
}
_OWN_LIMITS = {
    "watch_autoencoder": "The score rises with what cannot be foreseen from the window itself, noise above all: a new "
    "movement that is calm scores low. Look at the AUC above before trusting it with anything.",
}


def card_notes(name: str, module: nn.Module, *, is_own_data: bool = True) -> CardNotes:
    """What the card of a zoo model says.

    Args:
        module: the model as it was made; the result of another architecture under the same name is left out.
        is_own_data: whether its first parameters come from the data set that it is made for.
    """
    entry, result = ZOO[name], results().get(name)
    fits = result is not None and result.fits(module, load(name).input_shape)
    return CardNotes(
        summary=f"{entry.summary[0].upper()}{entry.summary[1:]}.",
        data=_DATA[entry.data] if is_own_data else "",
        federated=result.text() if result is not None and fits else "",
        limits=" ".join(filter(None, (_LIMITS[entry.data], _OWN_LIMITS.get(name)))),
    )
