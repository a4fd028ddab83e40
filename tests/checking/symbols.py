"""Which names a piece of source takes from outside."""

import symtable


def global_names(table: symtable.SymbolTable) -> set[str]:
    """Return the global names that a table's code and the functions and classes in it use."""
    inner = (global_names(child) for child in table.get_children())
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}.union(*inner)
