"""Compiled HLO: its instructions, products, collectives and schedule."""
