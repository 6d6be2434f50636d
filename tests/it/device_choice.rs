//! What `--device cuda` says where there is no GPU to be had.

use assert_cmd::Command;

/// `serve --device cuda`, which ends by itself where it cannot start.
fn serve() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora-hbm"));
    command.args(["serve", "--model", "tiny", "--port", "0", "--total-loras", "2", "--gpu-loras", "2"]);
    command.args(["--device", "cuda"]).env_remove("LORA_HBM_LOG");
    command.timeout(std::time::Duration::from_secs(60));
    command
}

/// What it says, if it ends with this status.
fn said(mut command: Command, status: i32) -> String {
    let out = command.assert().code(status).get_output().clone();
    String::from_utf8(out.stderr).unwrap()
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_program_without_cuda_says_how_to_build_one_with_it() {
    let said = said(serve(), 2);
    assert!(said.contains("error: --device cuda: this program is built without CUDA"), "{said}");
    assert!(said.contains("--features cuda") && said.contains("--device cpu"), "{said}");
}

#[cfg(feature = "cuda")]
mod with_cuda {
    use lora_kernels::{CudaError, Device};

    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_what_is_missing() {
        let Err(missing @ CudaError::Missing { .. }) = Device::open(0) else {
            println!("not tested: this machine has a driver");
            return;
        };
        let said = said(serve(), 1);
        assert!(said.contains(&format!("error: {missing}")), "{said}");
        assert!(said.contains("cannot be loaded") && said.contains("--device cpu"), "{said}");
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU, which it hides"]
    fn a_machine_whose_gpus_are_hidden_is_told_so() {
        let mut command = serve();
        command.env("CUDA_VISIBLE_DEVICES", "");
        let said = said(command, 1);
        assert!(
            said.contains("error: there is no CUDA device 0: 0 found (see CUDA_VISIBLE_DEVICES)"),
            "{said}"
        );
    }
}
