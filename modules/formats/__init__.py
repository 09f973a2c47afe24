"""Schemes, calibration files and functions of other projects."""
