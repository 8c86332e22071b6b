"""Septic patients to treat: one environment over three sources of dynamics."""
