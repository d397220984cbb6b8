"""A dense checkpoint to be made sparse. One that this suite pretrained is a mixture of one expert, read as dense."""

from pathlib import Path

from hpc.reuse.shape import dense_config
from hpc.reuse.stored import EXPERTS, StoredModel

DENSE_OF = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""An expert's matrix -> that of a dense block."""


class DenseModel(StoredModel):
    """The tensors of a dense model, under the names that a dense architecture gives them."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises DataError for a folder that is not a checkpoint."""
        super().__init__(folder)
        dense = dense_config(self.config)
        if dense is self.config:
            return
        self.config = dense
        for name in list(self.shapes):
            if name.endswith(".mlp.gate.weight"):  # a router with nothing to choose from
                del self.shapes[name], self._pieces[name]
            elif EXPERTS.search(name):
                block, role = name.rsplit(".experts.", 1)
                matrix = f"{block}.{DENSE_OF[role]}.weight"
                self.shapes[matrix] = self.shapes.pop(name)[1:]
                self._pieces[matrix] = self._pieces.pop(name)
