"""Parquet files of every type of column: read as pyarrow reads them, or refused with a reason."""

import datetime
import decimal
import random

import pyarrow as pa
import pyarrow.parquet

from dynmoe_jax import config
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import read_documents
from tests.odd_files import odd_text


def write(path, *columns):
    """Columns in an order, of which several may have one name."""
    arrays = [pa.array(values, kind) for _, values, kind in columns]
    names = [name for name, _, _ in columns]
    pa.parquet.write_table(pa.Table.from_arrays(arrays, names=names), path)


def read(path, **fields):
    return list(read_documents(config.Data(sources=f"parquet:{path}", **fields)))


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ("text", ["x", "y"], None), ("text", ["z", ""], None), ("more", [1, 2], None))
    reason = "has 2 columns 'text', of which one is meant"
    assert read(path) == [Broken(str(path), reason, 2)]
    write(path, ("text", ["x"], None), ("domain", ["a"], None), ("domain", ["b"], None))
    assert read(path) == [Broken(str(path), "has 2 columns 'domain', of which one is meant", 1)]
    struct = pa.struct([("set", pa.string()), ("set", pa.string())])
    write(path, ("text", ["x"], None), ("meta", [None], struct))
    (broken,) = read(path, domain_field="meta.set")
    assert broken.reason == "has 2 columns 'set' on the way to 'meta.set', of which one is meant"
    # Nobody asks for the others.
    assert [item.text for item in read(path)] == ["x"]


def test_lists_and_structs_are_no_text_and_no_domain(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ("text", [["x"], None, []], pa.list_(pa.string())))
    reason = "the column 'text' is of type list<element: string>, not of strings"
    assert read(path) == [Broken(str(path), reason, 3)]
    write(path, ("text", ["x"], None), ("domain", [["code"]], None))
    reason = "the column 'domain' is of type list<element: string>, not of strings"
    assert read(path) == [Broken(str(path), reason, 1)]
    write(path, ("text", [{"body": "x"}], None))
    assert "struct<body: string>" in read(path)[0].reason
    assert [item.text for item in read(path, text_field="text.body")] == ["x"]
    assert read(path, text_field="text.body.more")[0].reason == "has no column 'text.body.more'"


def test_a_column_with_a_dot_in_its_name_comes_before_what_is_within_another(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ("text", ["x"], None), ("meta", [{"set": "in"}], None), ("meta.set", ["on"], None))
    assert [item.domain for item in read(path, domain_field="meta.set")] == ["on"]


DAY = datetime.date(2024, 5, 6)
META = pa.struct([("set", pa.string()), ("in", pa.struct([("set", pa.int16())]))])
TEXTS = {
    pa.string(): ["x", None, "", "é\u2028"],
    pa.large_string(): ["x", None],
    pa.string_view(): ["x", None],
    pa.binary(): [b"x", b"\xff", None],
    pa.large_binary(): [b"x", None],
    pa.binary_view(): [b"x"],
    pa.binary(2): [b"xy", None],
    pa.dictionary(pa.int32(), pa.string()): ["x", "y", None],
    pa.json_(): ['{"a": 1}', None],
    pa.null(): [None],
}
WHOLE_NUMBERS = {pa.int8(): [1, None], pa.int16(): [3], pa.int64(): [-1], pa.uint64(): [2**63]}
OTHERS = {
    pa.bool_(): [True, None],
    pa.float16(): [0.5],
    pa.float64(): [0.5, None],
    pa.decimal128(5, 2): [decimal.Decimal("1.25")],
    pa.date32(): [DAY],
    pa.time64("us"): [datetime.time(1)],
    pa.timestamp("us", "UTC"): [datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC)],
    pa.duration("s"): [datetime.timedelta(1)],
    pa.uuid(): [b"0" * 16],
    pa.list_(pa.string()): [["x"], [], None],
    pa.large_list(pa.int32()): [[1]],
    pa.list_(pa.string(), 1): [["x"]],
    pa.map_(pa.string(), pa.string()): [[("a", "b")]],
    META: [{"set": "x", "in": {"set": 3}}, {"set": None, "in": None}, None],
}
TYPES = TEXTS | WHOLE_NUMBERS | OTHERS
NAMES = ("text", "domain", "meta", "meta.set", "text.set", "Text", "", "é", "text ")
FIELDS = ("text", "text", "text", "meta.set", "meta.in.set", "text.set", "meta", "é", "domain.set")


def values_of(columns, table, field):
    """(the values of a field as pyarrow reads them, their type), or None where it is not there.

    The type is None where two columns have the name.
    """
    name, *inside = field.split(".")
    places = [i for i, column in enumerate(columns) if column[0] == field]
    if places:
        inside = []
    elif inside:
        places = [i for i, column in enumerate(columns) if column[0] == name]
    if len(places) != 1:
        return ([], None) if places else None
    values, kind = table.column(places[0]).to_pylist(), columns[places[0]][2]
    for part in inside:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        values, kind = [value and value.get(part) for value in values], kind.field(part).type
    return values, kind


def expected(columns, table, text_field, domain_field, stem):
    """([(text, domain)], records lost), a row at a time as from JSON Lines."""
    text, domain = (values_of(columns, table, f) for f in (text_field, domain_field))
    fit = text is not None and text[1] in TEXTS
    if not fit or (domain is not None and domain[1] not in TEXTS | WHOLE_NUMBERS):
        return [], table.num_rows
    found, lost = [], 0
    for value, name in zip(text[0], domain[0] if domain else [None] * table.num_rows, strict=True):
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        try:
            value = value.decode() if isinstance(value, bytes) else value
            if value.strip():
                found.append((value, stem if name in (None, "") else str(name)))
        except (UnicodeDecodeError, AttributeError):  # no UTF-8, or None
            lost += 1
    return found, lost


def odd_table(rng):
    kinds, rows = list(TYPES), rng.randint(0, 4)
    names = ["text"] * (rng.random() < 0.8) + rng.choices(NAMES, k=rng.randint(0, 3))
    rng.shuffle(names)
    columns = []
    for name in names:
        kind = rng.choice(list(TEXTS) if rng.random() < 0.5 else kinds)
        values = rng.choices(TYPES[kind], k=rows)
        if kind == pa.string():
            values = [odd_text(rng) if rng.random() < 0.5 else value for value in values]
        columns.append((name, values, kind))
    return columns


def test_odd_schemas_are_read_as_pyarrow_reads_them(tmp_path, fuzz_cases):
    full = refused = 0
    for case in range(fuzz_cases(200, 2000)):
        rng = random.Random(case)
        path = tmp_path / f"{rng.choice(('a', 'b c', 'é', 'x.y'))}.parquet"
        columns = odd_table(rng)
        write(path, *columns)
        table = pa.parquet.ParquetFile(path).read()
        fields = rng.choice(FIELDS), rng.choice((*FIELDS, "domain", "domain"))
        items = read(path, text_field=fields[0], domain_field=fields[1])
        broken = [item for item in items if isinstance(item, Broken)]
        found = [item[:2] for item in items if not isinstance(item, Broken)]
        wanted = expected(columns, table, *fields, path.name.removesuffix(".parquet"))
        assert (found, sum(item.records for item in broken)) == wanted, f"case {case}: {broken}"
        assert all(item.reason and "\n" not in item.reason for item in broken)
        full, refused = full + bool(found), refused + bool(broken)
    assert min(full, refused) > 20
