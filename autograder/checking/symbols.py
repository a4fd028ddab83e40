"""Which names a piece of source reads from its module."""

import symtable
from collections.abc import Iterator


def names_read(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the global names that a scope, or one inside it, reads."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
            yield symbol.get_name()
    for inside in table.get_children():
        yield from names_read(inside)
