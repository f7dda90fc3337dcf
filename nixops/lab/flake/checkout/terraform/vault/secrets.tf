resource "vault_mount" "kv" {
  path        = "secret"
  type        = "kv"
  options     = { version = "2" }
  description = "KV Version 2 secret store"
}

locals {
  secrets = {
    "hosts/@host@/cache-secret" = {
      auto_generate = true
      password_length = 48
    }
    "hosts/@host@/forgejo-runner-token" = {
      auto_generate = false
      data          = { token = var.forgejo_runner_token }
    }
  }
}

resource "random_password" "auto_secrets" {
  for_each = { for path, secret in local.secrets : path => secret if secret.auto_generate }
  length   = each.value.password_length
  special  = false
}

resource "vault_kv_secret_v2" "secrets" {
  for_each = local.secrets
  mount    = vault_mount.kv.path
  name     = each.key
  data_json = jsonencode(
    each.value.auto_generate
    ? { password = random_password.auto_secrets[each.key].result }
    : each.value.data
  )
}
