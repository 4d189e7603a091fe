"""Tests of the accelerated stages."""
