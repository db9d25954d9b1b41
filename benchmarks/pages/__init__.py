"""HTML pages: the report of a result set, and what users were shown before and after learning."""
