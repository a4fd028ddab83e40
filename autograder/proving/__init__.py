"""How far the marks can be trusted."""
