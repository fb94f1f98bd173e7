"""Results to tables, pictures and pages: CSV, Markdown, LaTeX, PNG, one HTML report, the README's
generated blocks."""

from experiments.render.files import table_files

__all__ = ["table_files"]
