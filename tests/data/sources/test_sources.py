import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from dynmoe_jax import config
from dynmoe_jax.data import DataError, check_sources, prepare
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.data.sources.registry import parse_sources, parse_weights, read_documents
from tests.data.made_text import write_jsonl


def read(**settings) -> list[Document | Broken]:
    return list(read_documents(config.Data(**settings)))


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ("pyton", "'python'"),
        ("json:*.x", "'jsonl:GLOB'"),
        ("python,parket:a", "'parquet:GLOB'"),
        ("text", "'text:GLOB'"),
        ("tfds:", "'tfds:NAME'"),
        ("python:3", "'python'"),
        (" , ", "names no source"),
    ],
)
def test_a_misspelt_source_names_the_nearest_kind(sources, named):
    with pytest.raises(DataError, match=r"config.data.sources") as error:
        parse_sources(sources)
    assert named in str(error.value)


def test_check_names_the_glob_that_matches_nothing(tmp_path):
    with pytest.raises(DataError, match=r"nothing\*"):
        check_sources(config.Data(sources=f"python,text:{tmp_path}/nothing*"))


def test_check_finds_a_missing_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"config.data.tokenizer=.*absent.model"):
        check_sources(config.Data(tokenizer=str(tmp_path / "absent.model")))
    check_sources(config.Data(tokenizer=str(tmp_path)))  # a folder may hold one too


def test_check_finds_an_unknown_tfds_name():
    with pytest.raises(DataError, match="did you mean 'tfds:imdb_reviews'"):
        check_sources(config.Data(sources="tfds:imdb_review"))


@pytest.mark.parametrize("weights", ["code", "code=x", "=1", "a=-1", "a=1,a=2", "a=inf", "a=0"])
def test_bad_weights_are_refused_before_anything_is_written(weights):
    with pytest.raises(DataError, match=r"config.data.domain_weights"):
        check_sources(config.Data(domain_weights=weights))


def test_weights_of_domains_with_odd_names():
    assert parse_weights("C++ = 2, a=b=0.5,") == {"C++": 2.0, "a=b": 0.5}


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    found = read(sources=f"text:{tmp_path}/*.txt")
    assert found == [
        Document("first", "text", f"{tmp_path}/a.txt"),
        Document("one\n\ntwo", "text", f"{tmp_path}/b.txt"),
    ]


def test_jsonl_fields_and_the_domain_that_stands_in(tmp_path):
    path = tmp_path / "books.v1.jsonl"
    write_jsonl(
        path,
        [
            {"body": "a", "meta": {"set": "math"}},
            {"body": "b", "meta": {}},
            {"body": "c", "meta": {"set": None}},
            {"body": "d", "meta": {"set": 7}},
            {"body": ""},
        ],
    )
    found = read(sources=f"jsonl:{path}", text_field="body", domain_field="meta.set")
    assert [item[:2] for item in found] == [
        ("a", "math"),
        ("b", "books.v1"),
        ("c", "books.v1"),
        ("d", "7"),
    ]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_rows_with_and_without_a_domain(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["x", "", "y"], domain=["d", "d", None])
    write_parquet(tmp_path / "b.parquet", text=[b"z", b"\xff"], other=[1, 2])
    assert read(sources=f"parquet:{tmp_path}/*.parquet") == [
        Document("x", "d", f"{tmp_path}/a.parquet:1"),
        Document("y", "a", f"{tmp_path}/a.parquet:3"),
        Document("z", "b", f"{tmp_path}/b.parquet:1"),
        Broken(f"{tmp_path}/b.parquet:2", "not UTF-8 at byte 0"),
    ]


def test_parquet_fields_inside_structs(tmp_path):
    rows = [{"set": "math"}, {"set": "code"}]
    write_parquet(tmp_path / "a.parquet", text=["x", "y"], meta=rows)
    found = read(sources=f"parquet:{tmp_path}/*", domain_field="meta.set")
    assert [item.domain for item in found] == ["math", "code"]


def test_a_parquet_file_without_the_column_loses_all_its_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", content=["x", "y"])
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    missing, damaged = read(sources=f"parquet:{tmp_path}/*")
    assert missing == Broken(f"{tmp_path}/a.parquet", "has no column 'text'", 2)
    assert damaged.origin == f"{tmp_path}/b.parquet:1"


class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "content": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=3),
                "tags": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"content": f"Text {i} of {count}", "label": i % 2, "tags": [1, 2]}


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory):
    builder = TinyText(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_a_tfds_dataset_gives_its_training_split(tiny_text):
    found = read(sources=f"tfds:{tiny_text}", text_field="content")
    assert sorted(item.text for item in found) == [f"Text {i} of 4" for i in range(4)]
    assert {item.domain for item in found} == {"tiny_text"}
    assert found[0].origin == "tiny_text/train:0"


def test_a_tfds_feature_as_domain(tiny_text):
    found = read(sources=f"tfds:{tiny_text}", text_field="content", domain_field="label")
    assert {item.domain for item in found} == {"0", "1"}


@pytest.mark.parametrize("field", ["text_field", "domain_field"])
def test_a_tfds_feature_of_several_values_is_neither_text_nor_domain(tiny_text, field):
    found = read(sources=f"tfds:{tiny_text}", **{"text_field": "content", field: "tags"})
    what = field.removesuffix("_field")
    assert {item.reason for item in found} == {f"the {what} is of type ndarray, not a string"}


def test_a_missing_tfds_feature_is_named_with_those_there_are(tiny_text):
    with pytest.raises(DataError, match=r"text_field='text' is no feature.*'content', 'label'"):
        read(sources=f"tfds:{tiny_text}")


def test_what_was_prepared_here_can_be_a_source(prepared):
    dataset = next(prepared.directory.glob("*/1.0.0"))
    found = read(sources=f"tfds:{dataset}")
    amounts = [*prepared.train.values(), *prepared.heldout.values()]
    assert len(found) == sum(amount.documents for amount in amounts)
    assert {item.domain for item in found} == {"alpha", "beta", "gamma"}


def test_too_many_domains_name_the_field(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "x", "domain": str(i)} for i in range(1001)])
    with pytest.raises(DataError, match=r"config.data.domain_field='domain'"):
        prepare(config.Data(sources=f"jsonl:{path}"), tmp_path / "out")
