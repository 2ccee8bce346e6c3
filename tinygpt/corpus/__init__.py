"""From a named source, a URL or a file to clean documents in three splits."""
