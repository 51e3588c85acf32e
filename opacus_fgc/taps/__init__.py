"""Taps: the places where forward notes what was computed with a parameter, and backward shows the gradients that come back."""
