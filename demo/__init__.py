"""`make demo`: one host, end to end."""
