"""Datasets: generation, conversion, registration, mappers and loading."""
