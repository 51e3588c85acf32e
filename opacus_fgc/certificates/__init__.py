"""Certificates: proofs, from the definition, of whose each row is, and that no sample touches another's.

*Backward* (`ownership`). Under loss weights ``w``, one a sample, the backprops of a row of sample ``n`` are ``w[n]`` times
what they are under ones, and only then. Powers of two commute with rounding, so that this holds to the bit. It tells of the
model, the criterion and all that is between them. *Forward* (`independence`). With some samples of a batch replaced, in the
same shapes, modes and random states, nothing that is computed for the others changes. That is what neighbouring data sets are.
"""
