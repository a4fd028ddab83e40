"""From masters to notebooks, pages and pictures."""
