"""Loaders of training without labels, with a labelled bank and queries for the probe."""

from typing import Any

from torch.utils.data import DataLoader, Dataset

from dense_heads.data.datamodule import DataModule


class SelfSupervisedData(DataModule):
    """Crops to train on; validation is the k-NN probe: the bank, then the queries."""

    def __init__(
        self, train: Dataset[Any], bank: Dataset[Any] | None, queries: Dataset[Any] | None, **options: Any
    ) -> None:
        """`options`: those of DataModule."""
        super().__init__(train, None, None, **options)
        self.bank, self.queries = bank, queries

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Two loaders, or none without a probe."""
        loaders = [self._eval_loader(part, name) for part, name in ((self.bank, "bank"), (self.queries, "queries"))]
        return [loader for loader in loaders if isinstance(loader, DataLoader)]
