"""Thin Dagster assets: read inputs, call one function, write one artifact, report metadata."""
