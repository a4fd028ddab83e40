"""One module a unit: for each exercise its spec, its known mistakes, its right variants and its check."""
