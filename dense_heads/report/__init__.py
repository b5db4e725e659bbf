"""What a run leaves for people to look at: pictures, curves, tables, one page."""
