"""Figures, tables, reports and progress bars."""
