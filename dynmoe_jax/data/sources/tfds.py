"""TFDS datasets with a text feature, read without TensorFlow through random access."""

import difflib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.sources.document import Broken, Document, checked, field


def tfds_identity(name: str) -> str:
    """The dataset's full name: name, config and version."""
    return _builder(name).info.full_name


def read_tfds(name: str, text_field: str, domain_field: str) -> Iterator[Document | Broken]:
    """One document an example of the split ``train`` (of every split where there is no such).

    Args:
      name: what ``tfds.builder`` takes (``"wiki40b/en"``), or the folder of a prepared dataset.
      text_field: the text feature; a dotted name reaches into a nested one.
      domain_field: the feature with the domain; the dataset's name stands in where it is missing.

    Raises:
      DataError: there is no such dataset or feature, or it cannot be prepared as ArrayRecord.
    """
    builder = _builder(name)
    try:
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
        names = ["train"] if "train" in builder.info.splits else sorted(builder.info.splits)
        splits = [(split, builder.as_data_source(split)) for split in names]
    except Exception as error:  # whatever the dataset's own code raises
        raise _unreadable(name, error) from error
    for split, examples in splits:
        for index in range(len(examples)):
            origin = f"{builder.name}/{split}:{index}"
            try:
                example = examples[index]
            except Exception as error:  # of the reader's C++, or of a feature's decoder
                yield Broken(origin, f"cannot be read: {' '.join(str(error).split())[:300]}")
                continue
            try:
                text = field(example, text_field)
            except KeyError as error:
                features = ", ".join(map(repr, example))
                raise DataError(
                    f"config.data.text_field={text_field!r} is no feature of tfds:{name}; "
                    f"it has {features}."
                ) from error
            try:
                domain = field(example, domain_field)
            except KeyError:
                domain = None
            domain = domain.item() if np.ndim(domain) == 0 and hasattr(domain, "item") else domain
            item = checked(text, domain, origin, builder.name)
            if item is not None:
                yield item


def _builder(name: str) -> tfds.core.DatasetBuilder:
    try:
        if Path(name).expanduser().is_dir():
            return tfds.builder_from_directory(Path(name).expanduser())
        return tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise DataError(
            f"config.data.sources holds 'tfds:{name}', which is neither a dataset that TFDS knows "
            f"nor the folder of a prepared one; did you mean 'tfds:{nearest}'?"
        ) from error
    except Exception as error:  # tfds.builder raises errors of many kinds
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DataError:
    detail = " ".join(str(error).split())[:300]
    return DataError(
        f"config.data.sources holds 'tfds:{name}', which TFDS cannot give as ArrayRecord "
        f"({type(error).__name__}: {detail}); check the name, or give the folder of a dataset "
        "prepared with file_format='array_record'."
    )
