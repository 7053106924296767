"""The commands that are more than a call: their options, tables and pictures."""
