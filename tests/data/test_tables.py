"""CSV files as spreadsheets and editors spoil them."""

import pytest

from dpt_ray.data.manifest import index_manifest
from dpt_ray.data.pseudo_label_list import read_pseudo_label_list

FAULTS = {
    "another encoding": ("id,label\nGroße Vögel,a\n".encode("cp1252"), "is not UTF-8 text; save it as such"),
    "a comma": (
        b"id,label\na,b,c\n",
        "CSV parse error: Expected 2 columns, got 3: .*; put a value that has a comma in quotation",
    ),
    "no content": (b"", "Empty CSV file"),
    "a column twice": (b"id,label,label\na,b,c\n", "has two columns 'label'; rename or remove one"),
}


@pytest.mark.parametrize(("content", "said"), FAULTS.values(), ids=FAULTS)
def test_a_spoilt_table_is_told_with_its_file(tmp_path, content, said):
    file = tmp_path / "list.csv"
    file.write_bytes(content)
    for read in (index_manifest, lambda uri: read_pseudo_label_list(uri, None, [])):
        with pytest.raises(ValueError, match=rf"list\.csv:? {said}") as caught:
            read(str(file))
        assert "\n" not in str(caught.value)


def test_text_in_a_column_of_numbers_is_told_with_its_column(tmp_path):
    (tmp_path / "list.csv").write_text("id,length\na,12 cm\n")
    with pytest.raises(ValueError, match=r"list\.csv: In CSV column #1: .* int64: invalid value '12 cm'"):
        index_manifest(str(tmp_path / "list.csv"))
