"""MindIE-SD's names for `lplb.dynamic`."""
