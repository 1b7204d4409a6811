"""How a device gets in: the certificate authority, one-use tokens, enrolment and renewal."""
