"""Region features that other programs extracted: one reader per file format."""
