"""Results to tables, pictures and pages: CSV, Markdown, LaTeX, PNG, one HTML report, the README's
generated blocks."""
