//! From root to the user that serves: after the ports are bound, before any thread runs.
//!
//! There is no way back: the ids are changed for good, no group and no capability is left that was root's, and no program
//! that is started later gains any (`no_new_privs`).

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, getgrouplist, setgroups, setresgid, setresuid};

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};

/// Becomes that user, if this process is root; without a user it stays who it is. What it starts gains nothing.
pub(crate) fn lower(user: Option<&str>) -> Result {
    if let Some(name) = user {
        become_user(name)?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(|error| failed(format!("no_new_privs: {error}")))
}

fn become_user(name: &str) -> Result {
    let user = User::from_name(name).map_err(|error| failed(format!("the user {name}: {error}")))?;
    let Some(user) = user else {
        return Err(failed(format!("there is no user {name} on this machine")).hint(format!(
            "make it: useradd --system --shell /usr/sbin/nologin {name}; or take `user` out"
        )));
    };
    if !Uid::effective().is_root() {
        if Uid::effective() == user.uid {
            return Ok(());
        }
        return Err(failed(format!(
            "only root can become {name}, and this process is of user {}",
            Uid::effective()
        ))
        .hint(format!("start it as root or as {name}, or take `user` out")));
    }
    change(&user).map_err(|error| failed(format!("cannot become {name}: {error}")))?;
    // What must not be possible is tried.
    let is_back = setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok();
    if !user.uid.is_root() && (is_back || Uid::effective().is_root() || Uid::current().is_root()) {
        return Err(failed(format!("became {name}, and could become root again")));
    }
    tracing::info!(user = name, uid = user.uid.as_raw(), gid = user.gid.as_raw(), "root no more");
    Ok(())
}

/// Groups first: they are root's to change.
fn change(user: &User) -> nix::Result<()> {
    let name = CString::new(user.name.as_str()).map_err(|_| nix::errno::Errno::EINVAL)?;
    let groups: Vec<Gid> = getgrouplist(&name, user.gid)?;
    setgroups(&groups)?;
    setresgid(user.gid, user.gid, user.gid)?;
    setresuid(user.uid, user.uid, user.uid)
}

fn failed(what: String) -> Failure {
    Failure::new(Exit::Failed, "server.user", what)
}
