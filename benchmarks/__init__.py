"""Side-by-side measurements: `make bench`. What is measured and how: see __main__.py."""
