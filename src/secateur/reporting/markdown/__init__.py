"""Results as Markdown: model cards and comparisons."""
