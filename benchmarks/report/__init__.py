"""What the result files say, for people: tables in Markdown, pictures, and a page. Nothing here measures."""
