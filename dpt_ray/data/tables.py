"""Tables that users write as CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import IO

import pyarrow as pa
import pyarrow.csv


def read_csv(file: IO[bytes], name: str, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Return the table in a CSV file, with the given `types` of columns where these exist.

    Raises ValueError, which has the file's `name` and a remedy, where it is no such table.
    """
    try:
        options = pyarrow.csv.ConvertOptions(column_types=types)
        table = pyarrow.csv.read_csv(file, convert_options=options)
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        if "UTF8" in reason:
            raise ValueError(f"{name} is not UTF-8 text; save it as such") from None
        remedy = "; put a value that has a comma in quotation marks" if "columns, got" in reason else ""
        raise ValueError(f"{name}: {reason}{remedy}") from None
    if repeated := [column for column, count in Counter(table.column_names).items() if count > 1]:
        raise ValueError(f"{name} has two columns {repeated[0]!r}; rename or remove one")
    return table
