"""Printed tables."""


def row(table, name):
    """The cells of the row of a printed table that starts with `name`."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    return next(cells for cells in rows if cells[0] == name)
