from tests import fake_triton

fake_triton.install()
