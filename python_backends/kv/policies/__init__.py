"""Which entries leave a tier first: one interface, A²CR and the policies it is compared with."""
