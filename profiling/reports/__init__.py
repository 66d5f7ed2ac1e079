"""What a trace amounts to, as text, Markdown and a page; internal."""
